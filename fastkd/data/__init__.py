"""What a teacher is run on: documents from files or memory, as token ids."""
