"""What skewed routing costs, and what helps: scenarios and remedies."""
