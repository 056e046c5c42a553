"""DeepSeekMoE for deepwright: routers, bias balancing, grouped experts."""
