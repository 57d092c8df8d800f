"""Weight files beyond loading them: where they lie, what they seem to be, how to fetch them."""
