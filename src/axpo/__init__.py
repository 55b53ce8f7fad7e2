"""Reinforcement learning for tool-using vision-language agents by AXPO (arXiv 2605.28774)."""
