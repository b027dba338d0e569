"""Code that exists for the compiler of one backend, with what it saves."""
