"""The real scheduler under random schedules, with a worker and a model of arithmetic."""
