"""The cache format: what lies on disk. This package never imports torch."""
