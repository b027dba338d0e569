"""Published architectures, written with hooks: a file each."""
