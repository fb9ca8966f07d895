"""The student's side: in which order a cache is read, how that is cut into steps, and what a step is made of."""
