"""The hostile helpers: one C program, kept here as a package so that its source travels in the wheel."""
