"""Teacher outputs, computed once and read many times."""
