"""What the demo competition needs besides its config."""
