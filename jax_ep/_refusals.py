"""What a fabric does not serve: each function says why it refuses an exchange, or None.

They are named after what they refuse.
"""

from jax_ep._call import Call
from jax_ep._library import gpu_peers_problem, library


def several_devices(call: Call) -> str | None:
    """Refuses ranks on several devices."""
    if not call.spans_devices:
        return None
    devices = "GPUs" if call.platform == "gpu" else "devices"
    return f"it serves ranks that are all on one, and these are {call.layout.num_ranks} {devices}"


def many_choices(call: Call) -> str | None:
    """Refuses more choices than the kernels for GPUs have room for."""
    most, num_topk = library("gpu").jax_ep_max_topk(), call.layout.num_topk
    if num_topk > most:
        return f"it has room for {most} choices per token, and these are {num_topk}"
    return None


def several_gpus(call: Call) -> str | None:
    """Refuses ranks on several GPUs."""
    return many_choices(call) or several_devices(call)


def unfit_gpus(call: Call) -> str | None:
    """Refuses GPUs that are too many, or that cannot read each other's memory."""
    if (problem := many_choices(call)) is not None:
        return problem
    most, num_ranks = library("gpu").jax_ep_max_peers(), call.layout.num_ranks
    if num_ranks > most:
        return f"it has room for {most} ranks, and these are {num_ranks}"
    return gpu_peers_problem()


def gpus_of_several_processes(call: Call) -> str | None:
    """Refuses GPUs of several processes, and unfit ones."""
    return several_processes(call) or unfit_gpus(call)


def gpus_of_one_process(call: Call) -> str | None:
    """Refuses GPUs of one process, and unfit ones."""
    return one_process(call) or unfit_gpus(call)


def an_abstract_mesh(call: Call) -> str | None:
    """Refuses ranks of which nobody knows where they are."""
    if not call.is_placed:
        return "the mesh is abstract, so that its processes are not known"
    return None


def several_processes(call: Call) -> str | None:
    """Refuses ranks in several processes, or nobody knows where."""
    if call.spans_processes:
        count = max(map(len, call.groups))
        return f"it serves ranks on devices of one process, and these are in {count}"
    return an_abstract_mesh(call)


def one_process(call: Call) -> str | None:
    """Refuses ranks in one process, or nobody knows where."""
    if not call.spans_processes:
        return "it serves ranks on devices of several processes, and these are in one"
    return None


def one_device(call: Call) -> str | None:
    """Refuses ranks on one device."""
    if not call.spans_devices:
        return "it serves ranks on several devices, and these are on one"
    return None


def one_gpu(call: Call) -> str | None:
    """Refuses ranks on one GPU."""
    return one_device(call) or many_choices(call)
