"""Results as lm-evaluation-harness returns them, from values that documents have."""

import math
import statistics


def weighted_perplexity(pairs):
    return math.exp(-sum(value for value, _ in pairs) / sum(weight for _, weight in pairs))


def bits_per_byte(pairs):
    return -sum(value for value, _ in pairs) / sum(weight for _, weight in pairs) / math.log(2)


def perplexity(values):
    return math.exp(-statistics.fmean(values))


AGGREGATIONS = {
    "word_perplexity": weighted_perplexity,
    "byte_perplexity": weighted_perplexity,
    "bits_per_byte": bits_per_byte,
    "perplexity": perplexity,
}


def harness_of(tasks: dict, groups: dict | None = None, weight_by_size: bool = True) -> dict:
    """What the harness returns.

    Args:
        tasks: by task and metric, a value for each document; the metrics of AGGREGATIONS get theirs, others the mean.
        groups: tasks by group, whose accuracies are averaged.
        weight_by_size: whether groups weight tasks by their documents.
    """
    results, samples = {}, {}
    for task, metrics in tasks.items():
        n = len(next(iter(metrics.values())))
        results[task] = {"name": task, "alias": task, "sample_len": n}
        for metric, values in metrics.items():
            results[task][f"{metric},none"] = AGGREGATIONS.get(metric, statistics.fmean)(values)
            known = metric not in AGGREGATIONS and n > 1
            stderr = statistics.stdev(values) / math.sqrt(n) if known else "N/A"
            results[task][f"{metric}_stderr,none"] = stderr
        samples[task] = [
            {"doc_id": i, "filter": "none", **{metric: values[i] for metric, values in metrics.items()}}
            for i in range(n)
        ]
    for group, names in (groups or {}).items():
        sizes = [results[name]["sample_len"] if weight_by_size else 1 for name in names]
        total = sum(size * results[name]["acc,none"] for size, name in zip(sizes, names, strict=True))
        results[group] = {
            "name": group,
            "alias": group,
            "sample_len": sum(results[name]["sample_len"] for name in names),
        }
        results[group] |= {"acc,none": total / sum(sizes), "acc_stderr,none": "N/A"}
    return {
        "results": results,
        "samples": samples,
        "group_subtasks": groups or {},
        "versions": dict.fromkeys(tasks, 1.0) | dict.fromkeys(groups or {}, "N/A"),
        "n-shot": dict.fromkeys(tasks, 5),
        "higher_is_better": {task: {metric: metric not in AGGREGATIONS for metric in tasks[task]} for task in tasks},
    }
