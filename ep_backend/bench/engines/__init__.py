"""How `ep-backend bench-engine` starts and measures each inference engine: one module per engine."""
