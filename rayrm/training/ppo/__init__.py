"""Policy optimisation by sampled completions and their rewards: PPO, RLOO and GRPO."""
