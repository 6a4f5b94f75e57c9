"""One file for each command of ``sliderquant``."""
