"""The benchmark suite at equal seconds: tasks, methods and their rivals."""
