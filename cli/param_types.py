"""The kinds of values that options take: checked at once, passed on as they were written.

``click.ParamType`` is generic only in recent versions of click, hence the ignored type arguments.
"""

import click
from click.shell_completion import CompletionItem

from moe_offload.cli.user_text import mended
from moe_offload.errors import ConfigError


class ModelType(click.ParamType):  # type: ignore[type-arg]
    """A folder or the name of a model on the hub; the shell completes folders."""

    name = "model"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


class TextType(click.ParamType):  # type: ignore[type-arg]
    """A text for the model."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return mended(value)


class FormatType(click.Choice):  # type: ignore[type-arg]
    """A format of experts: one of the names, or mixed:3.5."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value.startswith("mixed:"):
            name: str = super().convert(value, param, ctx)
            return name
        from moe_offload.offload.pack.mixed import canonical

        try:
            return canonical(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class SizeType(click.ParamType):  # type: ignore[type-arg]
    """An amount of memory: 6GiB, 80%, auto."""

    name = "size"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from moe_offload.offload.planning.sizes import parse_size

        try:
            parse_size(value, total_bytes=1 << 50, free_bytes=1 << 50)  # only the spelling matters here
        except ConfigError as error:
            self.fail(str(error), param, ctx)
        return value


class VramType(SizeType):
    """An amount of GPU memory, or one for each of several GPUs: 0=10GiB,1=8GiB."""

    name = "size|gpu=size,..."

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from moe_offload.offload.planning.vram_option import vram_by_device

        try:
            sizes = vram_by_device(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)
        for size in [value] if sizes is None else sizes.values():
            super().convert(str(size), param, ctx)
        return value


class RateType(click.ParamType):  # type: ignore[type-arg]
    """Bytes a second: 3.5GB/s."""

    name = "rate"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from moe_offload.offload.planning.sizes import parse_rate

        if not isinstance(value, str):
            return value
        try:
            return float(parse_rate(value))
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class SlotsType(click.ParamType):  # type: ignore[type-arg]
    """Slots of each layer: 16, or a share of its experts: 25%."""

    name = "n|share"

    def convert(
        self, value: str | int | float, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float:
        if not isinstance(value, str):
            return value
        number, is_share = value.strip().removesuffix("%"), value.strip().endswith("%")
        if not number.replace(".", "", int(is_share)).isdecimal() or not 0 < float(number) <= (
            100 if is_share else 1e6
        ):
            self.fail(f"{value!r} is not a number of slots; write 16, or 25% of the experts", param, ctx)
        return float(number) / 100 if is_share else int(number)


class SharesType(click.ParamType):  # type: ignore[type-arg]
    """Shares of the experts: 25%,50%,100%."""

    name = "shares"

    def convert(
        self, value: str | tuple[float, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        shares = []
        for text in value.split(","):
            number = text.strip().removesuffix("%")
            if not number.replace(".", "", 1).isdecimal() or not 0 < float(number) <= 100:
                self.fail(f"{text!r} is not a share of the experts; write 50% or 25%,50%,100%", param, ctx)
            shares.append(float(number) / 100)
        return tuple(shares)


class PrefetchType(click.ParamType):  # type: ignore[type-arg]
    """How many layers to look ahead: off, auto or a number."""

    name = "off|auto|n"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        if value in ("off", "auto"):
            return value
        if not value.isdecimal() or int(value) == 0:
            self.fail(f"{value!r} is neither off, auto nor a number of layers from 1 up", param, ctx)
        return int(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in ("off", "auto") if name.startswith(incomplete)]


class DeviceType(click.ParamType):  # type: ignore[type-arg]
    """Where to compute: auto, cpu, cuda or cuda:N."""

    name = "device"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        kind, colon, index = value.partition(":")
        if value not in ("auto", "cpu", "cuda") and not (kind == "cuda" and colon and index.isdecimal()):
            self.fail(f"{value!r} is not a device; use auto, cpu, cuda or cuda:0", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in ("auto", "cpu", "cuda") if name.startswith(incomplete)]
