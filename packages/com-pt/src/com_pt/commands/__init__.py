"""The commands of ``com-pt``, one module per verb."""
