"""Lost devices: what becomes of the answer without them, and runs that survive a kill."""
