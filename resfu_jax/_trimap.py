"""The values of trimaps: where alpha is known to be 0, is not known, and is known to be 1."""

BACKGROUND, UNKNOWN, FOREGROUND = 0, 128, 255
