"""Chains: short programs of prompts, each filled in by a role. Plain sampling is one step."""
