"""Every command that computes takes --device, and all of them answer alike."""

import importlib
import shlex
from dataclasses import fields

import pytest
import torch

from effml_common.device import DEVICE_HELP
from workspace import members

# Commands that read formulas or rewrite files and compute nothing on a device.
WITHOUT = {
    "sliderquant": {"export", "inspect"},
    "com-pt": {"plan", "cost", "inspect"},
    "scalekd": {"export", "inspect"},
    "af-dcd": {"export", "inspect"},
    "morse-diffusion": {"inspect", "plan"},
    "fis-dit": {"inspect"},
}


def commands():
    """Program, entry point and command, for every command of the workspace."""
    for member in members():
        for script, address in member.scripts.items():
            module, _, function = address.partition(":")
            home = importlib.import_module(module)
            for command in home.COMMANDS:
                yield member.name, script, getattr(home, function), command


def config_class(command):
    module, _, name = command.config.partition(":")
    return getattr(importlib.import_module(module), name)


def takes_device(command) -> bool:
    return "device" in {field.name for field in fields(config_class(command))}


ALL = list(commands())
COMPUTING = [(script, run, command) for _, script, run, command in ALL if takes_device(command)]
each_computing = pytest.mark.parametrize(
    ("script", "run", "command"), COMPUTING, ids=[f"{s} {c.name}" for s, _, c in COMPUTING]
)


def answer(monkeypatch, capsys, script, run, command, device: str) -> tuple[int, str]:
    """Exit code and stderr of the command's first worked example on a device."""
    words = [*shlex.split(command.examples[0])[1:], "--device", device]
    monkeypatch.setattr("sys.argv", [script, *words])
    with pytest.raises(SystemExit) as stop:
        run()
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("package", sorted(WITHOUT))
def test_every_command_that_computes_takes_a_device(package: str) -> None:
    without = {
        command.name for name, _, _, command in ALL if name == package and not takes_device(command)
    }
    assert without == WITHOUT[package]


@each_computing
def test_the_default_is_auto_and_the_help_names_the_same_choices(script, run, command) -> None:
    field = next(f for f in fields(config_class(command)) if f.name == "device")
    assert field.default == "auto"
    assert field.metadata["help"].startswith(DEVICE_HELP)


@each_computing
def test_an_unknown_device_is_one_line(monkeypatch, capsys, script, run, command) -> None:
    code, err = answer(monkeypatch, capsys, script, run, command, "tpu")
    assert (code, err) == (2, f"error: device 'tpu' is unknown; use {DEVICE_HELP}\n")


@each_computing
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "xpu"])
def test_an_absent_device_is_one_line(monkeypatch, capsys, script, run, command, device) -> None:
    for backend in (torch.cuda, torch.xpu, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    kind = device.partition(":")[0]
    code, err = answer(monkeypatch, capsys, script, run, command, device)
    wanted = f"error: device {device} is not there (torch finds no {kind} device); use cpu\n"
    assert (code, err) == (2, wanted)
