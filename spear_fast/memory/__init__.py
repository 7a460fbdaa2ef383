"""What a run needs of a GPU: shapes of models, the memory plan, predicted step times, live readings."""
