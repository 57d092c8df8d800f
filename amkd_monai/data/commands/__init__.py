"""Commands that check, show and fetch a data set."""
