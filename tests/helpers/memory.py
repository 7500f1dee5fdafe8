"""Memory that functions take, as torch's profiler sees it: without that of numpy."""

from torch.profiler import ProfilerActivity, profile


def most_bytes(function):
    """The most bytes of tensors that a function has at once, beside those that are there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
