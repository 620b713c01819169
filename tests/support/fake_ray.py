"""What ``mech.scale.ray_actors`` asks of Ray, inside this process: for what goes wrong in a cluster."""


class RayError(Exception):
    pass


class Handle:
    """An actor: each method has ``remote`` and ``options(...).remote``, which run at once."""

    def __init__(self, cluster, made):
        self._cluster, self._made = cluster, made

    def __getattr__(self, name):
        return Method(self._cluster, getattr(self._made, name))


class Method:
    def __init__(self, cluster, call):
        self._cluster, self._call = cluster, call

    def options(self, name):
        self._cluster.names.append(name)
        return self

    def remote(self, *given):
        try:
            found = self._call(*given)
        except Killed as error:
            found = RayError(str(error))
        ref = f"ref {len(self._cluster.done)}"
        self._cluster.done[ref] = found
        return ref


class Killed(BaseException):
    """Raised inside an actor: its process is gone."""


class Cluster:
    """The module ``ray``, connected to ``nodes``, each a dict of its resources."""

    def __init__(self, *nodes):
        self._nodes, self.done, self.names, self.started, self.killed = nodes, {}, [], 0, 0
        self.exceptions = type("exceptions", (), {"RayError": RayError})

    def nodes(self):
        return [{"Alive": True, "Resources": resources} for resources in self._nodes]

    def is_initialized(self):
        return True

    def remote(self, kind):
        cluster = self

        class Made:
            def options(self, **needs):
                return self

            def remote(self, *given):
                cluster.started += 1
                return Handle(cluster, kind(*given))

        return Made()

    def wait(self, refs, num_returns, timeout):
        return refs[:num_returns], refs[num_returns:]

    def get(self, refs):
        found = [self.done[ref] for ref in ([refs] if isinstance(refs, str) else refs)]
        for one in found:
            if isinstance(one, RayError):
                raise one
        return found[0] if isinstance(refs, str) else found

    def kill(self, actor):
        self.killed += 1
