"""GRPO and its family for deepwright: rewards, rollouts, advantages, policy losses, distillation."""
