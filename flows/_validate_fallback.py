from deepwright_core.errors import RequestError
from deepwright_core.registry import KINDS, parse


def validate(registry, composed):
    out, problems = {}, []
    groups = {k.group: k.name for k in KINDS.values() if k.group and "/" not in k.group}
    for key, value in composed.items():
        try:
            if key in registry.names("stage"):
                out[key] = parse(registry.get("stage", key).config, value, key, registry)
            elif key in groups:
                out[key] = registry.parse(groups[key], value, key)
            elif isinstance(value, dict):
                problems.append(f"{key} is not a section")
            else:
                out[key] = value
        except RequestError as e:
            problems += e.problems
    if problems:
        raise RequestError(problems)
    return out
