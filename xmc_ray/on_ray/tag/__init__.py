"""The tagging job: a night is planned, done piece by piece, added up and published."""
