"""What a machine has, what a layout takes of it, and how fast that is."""
