"""Modules whose forward does batch norm in all kinds of ways, and what is to be fused in each of them."""

# Written as people write them:
# ruff: noqa: RET504, SIM108

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

C = 4


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(C)
        self.conv2 = nn.Conv2d(C, C, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=True)
        self.down = None


FUSED, APART = {}, {}  # class: how its batch norms are computed, in their order; APART: not to be fused


def fused(*how):
    def register(cls):
        FUSED[cls] = list(how)
        return cls

    return register


def apart(*how):
    def register(cls):
        APART[cls] = list(how)
        return cls

    return register


# ---- an activation behind a batch norm


@fused("fused relu")
class Nested(Base):
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)))


@fused("fused relu", "fused relu")
class NestedTwice(Base):
    def forward(self, x):
        return self.conv2(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))))


@fused("fused relu")
class SameName(Base):
    def forward(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        return self.conv2(x)


@fused("fused relu")
class OtherNames(Base):
    def forward(self, x):
        y = self.conv1(x)
        z = self.bn1(y)
        out = self.relu(z)
        return self.conv2(out) + x


@fused("fused relu")
class Returned(Base):
    def forward(self, x):
        x = self.bn1(self.conv1(x))
        return F.relu(x, inplace=True)


@fused("fused relu")
class InsideAnotherCall(Base):
    def forward(self, x):
        x: torch.Tensor = self.bn1(x)
        x = F.max_pool2d(torch.relu(x), 2)
        return x.flatten(1)


@fused("fused relu")
class AppendedToAList(Base):
    def forward(self, x):
        found = []
        y = self.bn1(x)
        found.append(F.relu(y))
        return torch.cat([*found, x], 1)


@fused("fused leaky_relu", "fused relu6")
class WithArguments(Base):
    def __init__(self):
        super().__init__()
        self.slope = 0.25

    def forward(self, x):
        x = F.leaky_relu(self.bn1(x), self.slope, inplace=True)
        return F.relu6(self.bn2(x), inplace=False)


@fused("fused silu", "fused hardswish")
class FunctionAsAttribute(Base):
    def __init__(self):
        super().__init__()
        self.act1, self.act2 = F.silu, F.hardswish

    def forward(self, x):
        return self.act2(self.bn2(self.act1(self.bn1(x))))


@fused("fused relu", "fused relu")
class AList(Base):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(C), nn.BatchNorm2d(C)])

    def forward(self, x):
        for i in range(2):
            x = self.norms[i](x)
            x = F.relu(x)
        return x


@fused("fused relu")
class UnderAContext(Base):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False), contextlib.nullcontext():
            x = self.bn1(x)
            x = self.relu(x)
        return x


@fused("fused relu")
class NestedInATry(Base):
    def forward(self, x):
        try:
            return self.relu(self.bn1(x))
        finally:
            del x


@fused("fused relu")
class OnlySometimes(Base):
    """What is a batch norm in one branch may be anything in the other."""

    def forward(self, x, norm=True):
        if norm:
            x = self.bn1(x)
        return self.relu(x)


@fused("fused relu")
class WithinABranch(Base):
    def forward(self, x, act=True):
        y = self.bn1(x)
        if act:
            y = self.relu(y)
        return y


@fused("fused relu", "fused relu")
class FirstOfSeveral(Base):
    def forward(self, x):
        y = self.bn1(x)
        y, z = self.relu(y), 2 * x
        y = self.bn2(y + z)
        return self.relu(y).flatten(1)[:, 2:]


@fused("fused relu")
class WithoutAResult(Base):
    """What waits at the end of a method is computed there."""

    def forward(self, x, act=True):
        found = [x]
        self.note(x, found, act)
        return found[-1]

    def note(self, x, found, act):
        y = self.bn1(x)
        if act:
            found.append(F.relu(y))


class Parent(Base):
    def forward(self, x):
        return self.finish(self.conv1(x))

    def finish(self, x):
        x = self.bn1(x)
        return self.relu(x)


@fused("fused relu")
class Inherited(Parent):
    def forward(self, x, *, scale=2.0):
        return super().forward(x) * scale


def made_in_a_function():
    factor = 3.0

    @fused("fused relu")
    class Closure(Base):
        __secret = 2.0

        def forward(this, x):
            x = this.bn1(x)
            x = this.relu(x)
            return x * factor * this.__secret + len(super().extra_repr())

    return Closure


made_in_a_function()


# ---- an addition behind it


@fused("fast", "fused add + relu")
class BetweenWithAnOption(Base):
    def __init__(self):
        super().__init__()
        self.project = Scaled()

    def forward(self, x, times=2.0):
        out = self.bn1(self.conv1(x))
        identity = self.project(x, times)
        out += identity
        return F.relu(out)


class Scaled(Base):
    def forward(self, x, times):
        return self.bn2(x) * times


@fused("fused relu", "fused add + relu")
class Residual(Base):
    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.down is not None:
            identity = self.down(x)
        out += identity
        out = self.relu(out)
        return out


@fused("fused relu", "fast", "fused add + relu")
class ResidualDown(Residual):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C))


@fused("fused add + relu")
class SumOfNames(Base):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        out = out + x
        out = F.relu(out)
        return out


@fused("fused add + relu", "fused add + relu")
class SumsInside(Base):
    def forward(self, x):
        x = self.relu(x + self.bn1(self.conv1(x)))
        y = self.bn2(x)
        return self.relu(torch.add(x, y))


@fused("fast", "fused add + relu")
class Shortcut(Base):
    def __init__(self):
        super().__init__()
        self.shortcut = nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C))

    def forward(self, x):
        out = self.bn2(self.conv2(x))
        out += self.shortcut(x)
        return F.relu(out)


@fused("fused add", "fused add")
class WithoutActivation(Base):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(self.conv1, self.bn1)

    def forward(self, x):
        x = x + self.branch(x)
        return torch.add(self.bn2(x), x)


@fused("fused add")
class AddedInABranch(Base):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(self.conv1, self.bn1)
        self.connect = True

    def forward(self, x):
        result = self.branch(x)
        if self.connect:
            result += x
        return result


@fused("fast", "fused add + silu")
class TwoBranches(Base):
    """The sum is made in both branches, the activation behind them."""

    def __init__(self):
        super().__init__()
        self.project = nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C))
        self.branch = nn.Sequential(self.conv1, self.bn1)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        if self.project is not None:
            x = self.project(x) + self.branch(x)
        else:
            x = x + self.branch(x)
        return self.act(x)


@fused("fused add")
class SumSeenByAnInnerFunction(Base):
    def forward(self, x):
        def seen():
            return z

        y = self.bn1(x)
        z = y + x
        out = F.relu(z)
        return out + seen()


@fused("fused add")
class TwoResiduals(Base):
    def forward(self, x):
        first, second = torch.ones_like(x), self.conv1(x)
        out = self.bn1(x)
        out += first
        out += second
        return F.relu(out)


@fused("fused add")
class ResidualChangedAfterItWasAdded(Base):
    def forward(self, x):
        identity = self.conv2(x)
        out = self.bn1(x)
        out += identity
        r = self.relu(identity)
        out = F.relu(out)
        return out + r


@fused("fused add")
class ActivationThatIsNotKnown(Base):
    def forward(self, x):
        out = self.bn1(x)
        out += x
        return F.gelu(out)


# ---- not to be fused: another result, or one that somebody else sees


@apart("fast")
class ReadTwice(Base):
    def forward(self, x):
        y = self.bn1(x)
        z = F.relu(y)
        return y + z


@apart("fast")
class ReadTwiceAtOnce(Base):
    def forward(self, x):
        y = self.bn1(x)
        return F.relu(y) * y


@apart("fast")
class ActivationInPlaceOnly(Base):
    def forward(self, x):
        y = self.bn1(x)
        self.relu(y)
        return y


@apart("fast", "fast")
class ReadInTheNextRound(Base):
    def forward(self, x):
        y = x
        for norm in (True, False):
            z = y * 2
            if norm:
                y = self.bn1(z)
                x = x + F.relu(y)
            else:
                x = self.bn2(y) * x
        return x


@apart("fast")
class ReadBehindABreak(Base):
    def forward(self, x):
        y = x
        for i in range(3):
            y = self.bn1(x)
            z = F.relu(y)
            if i == 0:
                break
            y = x
        return y + z


@apart("fast")
class InputChangedBetween(Base):
    def forward(self, x):
        t = self.conv1(x)
        y = self.bn1(t)
        t.add_(1)
        y += x
        return F.relu(y)


@apart("fast")
class InputChangedByAModule(Base):
    def forward(self, x):
        t = self.conv1(x)
        y = self.bn1(t)
        r = self.relu(t)
        y += r
        return F.relu(y)


@apart("fast")
class InputChangedUnderAnotherName(Base):
    def forward(self, x):
        t = self.conv1(x)
        alias = t.view(t.shape)
        y = self.bn1(t)
        r = self.relu(alias)
        y += r
        return F.relu(y)


@apart("fast")
class InputChangedAsTheResidualIsComputed(Base):
    def forward(self, x):
        t = self.conv1(x)
        alias = t[:]
        return F.relu(self.bn1(t) + self.relu(alias))


@apart("fast", "fast")
class SameNormBetween(Base):
    """The running averages depend on the order."""

    def __init__(self):
        super().__init__()
        self.shortcut = nn.Sequential(self.conv2, self.bn1)

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        out += self.shortcut(x)
        return F.gelu(out)


@apart("fast", "fast")
class MethodBetween(Base):
    """A method may do anything, such as to change the mode of the batch norm."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        r = self.other(x)
        out += r
        return F.relu(out)

    def other(self, x):
        self.bn1.momentum = 0.5
        y = self.bn2(x)
        return y.abs()


@apart("fast")
class ReturnsBetween(Base):
    """The batch norm is computed, and counts, although its result goes nowhere."""

    def forward(self, x, early=True):
        y = self.bn1(x)
        if early:
            return x
        return F.relu(y)


@apart("fast")
class SeenByAnInnerFunction(Base):
    def forward(self, x):
        def seen():
            return y

        y = self.bn1(x)
        z = F.relu(y)
        return z + seen()


@apart("fast")
class SeenByAHandler(Base):
    def forward(self, x):
        y = x
        try:
            y = self.bn1(x)
            y = self.relu(y)
            raise LookupError
        except LookupError:
            return y


@apart("fast")
class SeenByLocals(Base):
    def forward(self, x):
        y = self.bn1(x)
        z = F.relu(y)
        return z + locals()["y"]


@apart("fast")
class AddedToTheCallers(Base):
    """``x += ...`` changes the caller's tensor."""

    def forward(self, x):
        x = x.clone()
        alias = x
        x += self.bn1(2 * x)
        return F.relu(x) + alias


@apart("fast")
class AFunctionOfThatName(Base):
    def forward(self, x):
        return Doubling.relu(self.bn1(x))


@apart("fast")
class ASumOfThatName(Base):
    def forward(self, x):
        return F.relu(Doubling.add(self.bn1(x), x))


class Doubling:
    @staticmethod
    def relu(x):
        return 2 * x

    @staticmethod
    def add(x, y):
        return 2 * x + y


@apart("fast")
class CallInTheTarget(Base):
    """It comes before the value."""

    def forward(self, x):
        sums = [0.0]
        y = self.bn1(x)
        sums[self.first()] += F.relu(y)
        return sums[0]

    def first(self):
        self.bn1.momentum = 0.5
        return 0


@apart("fast")
class NegativeSlope(Base):
    def forward(self, x):
        return F.leaky_relu(self.bn1(x), -0.5)


@apart("fast")
class ChangedBeforeTheActivation(Base):
    def forward(self, x):
        y = self.bn1(x)
        y *= 2
        return F.relu(y)


@apart("fast")
class OtherNamesInTheBranches(Base):
    def forward(self, x, first=True):
        y = z = x
        if first:
            y = self.bn1(x)
        else:
            z = self.bn2(x)
        return F.relu(y) + F.relu(z)


@apart("fast")
class InALambda(Base):
    def forward(self, x):
        function = lambda t: self.relu(self.bn1(t))  # noqa: E731
        return function(x)


@apart("fast")
class GlobalName(Base):
    def forward(self, x):
        global seen_by_all
        seen_by_all = self.bn1(x)
        return F.relu(seen_by_all)


@apart("fast")
class Generator(Base):
    def forward(self, x):
        return sum(self.parts(x))

    def parts(self, x):
        yield self.relu(self.bn1(x))


@apart("fast")
class Decorated(Base):
    @contextlib.contextmanager
    def forward(self, x):
        yield self.relu(self.bn1(x))

    def __call__(self, x):
        with super().__call__(x) as y:
            return y
