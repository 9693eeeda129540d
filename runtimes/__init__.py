"""What runs a release elsewhere: GGUF files, small weights, servers, tool calls."""
