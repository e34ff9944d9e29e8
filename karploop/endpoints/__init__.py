"""Models behind an OpenAI-compatible address: calls that fail, are limited, and cost money."""
