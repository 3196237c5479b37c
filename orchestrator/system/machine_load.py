"""How busy a worker's machine is, under the names by which MLflow shows system metrics."""

import psutil
import torch


class MachineLoad:
    """Processor and memory of this machine, and the memory of the GPU that this process uses, if it does."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # what the next call counts from

    def read(self) -> dict[str, float]:
        """Values by name, in percent and megabytes (10^6 bytes); the processor's is the mean since the last call."""
        memory = psutil.virtual_memory()
        found = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / 1e6,
            "system/system_memory_usage_percentage": memory.used / memory.total * 100,
        }
        if torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info()
            name = f"system/gpu_{torch.cuda.current_device()}_memory_usage"
            found[f"{name}_megabytes"] = (total - free) / 1e6
            found[f"{name}_percentage"] = (total - free) / total * 100
        return found

    @staticmethod
    def waiting() -> dict[str, float]:
        """`load`: how many threads ran or waited to run in the last minute; `processors`: of the machine."""
        return {"load": psutil.getloadavg()[0], "processors": psutil.cpu_count() or 1}
