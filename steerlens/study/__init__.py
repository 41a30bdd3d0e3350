"""Does it work, against controls? Responses, scores, quality, sweeps, engines, and the whole job."""
