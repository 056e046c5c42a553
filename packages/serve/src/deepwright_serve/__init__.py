"""An OpenAI-compatible server and a chat page over deepwright's engine."""
