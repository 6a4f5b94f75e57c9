"""The method of the Morse paper in torch alone: schedule, sampling rule, training pairs, residuals."""
