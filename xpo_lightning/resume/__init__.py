"""What a resumed run needs besides its weights."""
