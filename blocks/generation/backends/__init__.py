"""What exists for the compiler of one backend."""
