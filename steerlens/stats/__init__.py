"""Arrays and tables only: rates with intervals, paired comparisons, slopes, Pareto fronts, words."""
