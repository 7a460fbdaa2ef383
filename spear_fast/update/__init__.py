"""Update: the policy network on packed sequences, its optimizer, and one optimizer step over groups of rows."""
