"""``com-pt individual``: train one member alone, by the same code as the chain."""

from com_pt.commands.train import train_and_report, with_overrides
from com_pt.config import IndividualConfig
from com_pt.training.chain import load_chain
from effml_common.device import resolve_device
from effml_common.report import Report


def individual(config: IndividualConfig) -> Report:
    """Train one member alone."""
    device = resolve_device(config.device)
    chain = with_overrides(load_chain(config.chain), config).individual(config.member)
    return train_and_report(config, chain, "individual", device)
