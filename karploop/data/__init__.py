"""Problems and their text: tasks, the held-out split, and the tokenizer. Never imports jax."""
