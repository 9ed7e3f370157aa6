"""What a model will need and how fast it will run, before its weights are here; and whether it came true."""

from moe_offload.offload.forecast.forecast import Forecast, forecast
from moe_offload.offload.forecast.machine import Machine, Rate
from moe_offload.offload.forecast.measured_machine import GivenMachine, machine_of
from moe_offload.offload.forecast.model_shape import open_shape

__all__ = ["Forecast", "GivenMachine", "Machine", "Rate", "forecast", "machine_of", "open_shape"]
