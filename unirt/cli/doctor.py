"""`unirt doctor`: what this machine has, which engines work here, and what would fix the others."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.text import Text

from unirt.candidates import backends
from unirt.candidates import devices as found_devices
from unirt.cli.arguments import Debug, Json
from unirt.cli.outcome import NOTHING, OK, reporting
from unirt.cli.terminal import (
    Column,
    plural,
    print_heading,
    print_pairs,
    print_table,
    size_text,
    stdout,
    waiting,
)
from unirt.devices import nvidia_status
from unirt.plugins import Plugin
from unirt.types import Device


def doctor(
    options: Annotated[
        bool, typer.Option("--options", help="List every engine's options.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show this machine, which engines work on it, and what would fix the others."""
    with reporting(as_json, debug) as report:
        with waiting("looking for engines", as_json):
            plugins = backends()
            works = any(plugin.availability.available for plugin in plugins)
            devices = found_devices()
            nvidia = nvidia_status()
        report.code = OK if works else NOTHING
        report.document = {
            "ok": works,
            "unirt": version("unirt"),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "os": platform.platform(),
            "devices": [_device(device) for device in devices],
            "nvidia": nvidia,
            "plugins": [_plugin(plugin, options) for plugin in plugins],
        }
        if not as_json:
            console = stdout()
            _show(console, devices, nvidia, plugins)
            if options:
                _show_options(console, plugins)


def _device(device: Device) -> dict[str, Any]:
    return {
        "device": str(device),
        "name": device.name,
        "memory_bytes": device.memory_bytes,
        "facts": dict(device.facts),
    }


def _plugin(plugin: Plugin, options: bool) -> dict[str, Any]:
    found = plugin.availability
    told = {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "available": found.available,
        "version": found.version or None,
        "devices": [str(device) for device in found.devices],
        "reason": found.reason or None,
        "hint": found.hint or None,
        "missing": dict(found.missing),
        "targets": [str(device) for device in found.targets],
    }
    if options and plugin.backend is not None:
        told["options"] = [
            {"name": info.name, "type": info.type, "default": info.default, "help": info.help}
            for info in plugin.backend.options.describe()
        ]
    return told


def _show(
    console: Console, devices: Sequence[Device], nvidia: str, plugins: Sequence[Plugin]
) -> None:
    versions = f", Python {platform.python_version()}, NumPy {np.__version__}, "
    system = f"{platform.system()} {platform.release()}"
    console.print(Text.assemble((f"UniRT {version('unirt')}", "bold"), versions, system))
    print_heading(console, "Devices")
    print_table(
        console,
        [Column("device"), Column("memory", right=True), Column("name")],
        [[str(device), size_text(device.memory_bytes), device.name] for device in devices],
    )
    facts = [(str(device), _facts(device)) for device in devices]
    print_pairs(console, [pair for pair in facts if pair[1]], indent=2)
    print_pairs(console, [("NVIDIA", nvidia)], indent=2)
    print_heading(console, "Engines")
    if not plugins:
        console.print(Text("None is installed: pip install 'unirt[cpu]'"))
        return
    print_pairs(console, [(plugin.name, _line(plugin)) for plugin in plugins], style="bold")
    missing = [
        (f"{plugin.name}@{kind}", reason)
        for plugin in plugins
        for kind, reason in plugin.availability.missing.items()
    ]
    if missing:
        print_heading(console, "Devices that engines could use, but not here")
        print_pairs(console, missing)


def _line(plugin: Plugin) -> str:
    found = plugin.availability
    source = "" if plugin.distribution == "unirt" else f", from {plugin.distribution}"
    if found.available:
        return f"{found.version} on {', '.join(map(str, found.devices))}{source}"
    return f"not usable: {found.reason}{f'; {found.hint}' if found.hint else ''}{source}"


def _facts(device: Device) -> str:
    facts = device.facts
    told = []
    if "usable_physical_cores" in facts:
        told.append(
            f"{facts['usable_physical_cores']} of {plural(facts['physical_cores'], 'core')}, "
            f"{facts['usable_logical_cores']} of {plural(facts['logical_cores'], 'thread')} usable"
        )
    if facts.get("cpu_quota"):
        told.append(f"a quota of {facts['cpu_quota']:g} CPUs")
    if facts.get("instruction_sets"):
        told.append(" ".join(facts["instruction_sets"]))
    if facts.get("memory_limited_by"):
        told.append(f"memory limited by {facts['memory_limited_by']}")
    if facts.get("container"):
        told.append("in a container")
    if facts.get("compute_capability"):
        told.append(f"compute capability {facts['compute_capability']}")
    if facts.get("available_memory_bytes") is not None:
        told.append(f"{size_text(facts['available_memory_bytes'])} free")
    engines = facts.get("engines", ())
    told.append(f"used by {', '.join(engines)}" if engines else "used by no engine")
    return "; ".join(told)


def _show_options(console: Console, plugins: Sequence[Plugin]) -> None:
    for plugin in plugins:
        if plugin.backend is None:
            continue
        described = plugin.backend.options.describe()
        print_heading(console, f"Options of {plugin.name}")
        if not described:
            console.print(Text("none"))
        print_pairs(
            console,
            [
                (info.name, f"{info.help} [{info.type}; default {_default(info.default)}]")
                for info in described
            ],
        )


def _default(value: object) -> str:
    if value is None or value == {} or value == ():
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
