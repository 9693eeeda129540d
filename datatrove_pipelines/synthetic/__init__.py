"""Chats that a larger model writes: think answers to prompts without any, and preference pairs."""
