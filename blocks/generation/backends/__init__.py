"""Code for one backend each: compiling a step, and the needs of its compiler."""
