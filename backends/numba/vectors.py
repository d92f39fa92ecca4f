"""LLVM vectors by short names, for the few loops that must stay in registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import for_range
from numba.extending import intrinsic

from . import machine

INDEX, SHORT, BIT = ir.IntType(64), ir.IntType(32), ir.IntType(1)
LINE = 16  # float32 numbers of a cache line


class Vectors:
    """Code over vectors of `width` numbers of the LLVM type `element`, written by `builder`."""

    def __init__(self, builder: ir.IRBuilder, element: ir.Type, width: int):
        self.builder, self.element, self.width = builder, element, width
        self.type = ir.VectorType(element, width)

    def at(self, pointer: Any, *terms: Any) -> Any:
        """Address of the element `terms` added up behind `pointer`."""
        total = terms[0]
        for term in terms[1:]:
            total = self.builder.add(total, term)
        return self.builder.gep(pointer, [total])

    def load(self, pointer: Any, element: ir.Type | None = None) -> Any:
        """`width` neighbouring numbers, of another type if told, wherever they stand."""
        element = element or self.element
        whole = self.builder.bitcast(pointer, ir.VectorType(element, self.width).as_pointer())
        return self.builder.load(whole, align=element_bytes(element), typ=ir.VectorType(element, self.width))

    def store(self, vector: Any, pointer: Any) -> None:
        whole = self.builder.bitcast(pointer, self.type.as_pointer())
        self.builder.store(vector, whole, align=element_bytes(self.element))

    def spread(self, number: Any) -> Any:
        """One number in every lane."""
        nothing = ir.Constant(self.type, ir.Undefined)
        first = self.builder.insert_element(nothing, number, ir.Constant(SHORT, 0))
        return self.builder.shuffle_vector(
            first, nothing, ir.Constant(ir.VectorType(SHORT, self.width), [0] * self.width)
        )

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a·b + c, rounded once where the CPU can."""
        bits = 8 * element_bytes(self.element)
        name = f"llvm.{'fma' if machine.fuses() else 'fmuladd'}.v{self.width}f{bits}"
        module = self.builder.module
        function = module.globals.get(name) or ir.Function(module, ir.FunctionType(self.type, [self.type] * 3), name)
        return self.builder.call(function, [a, b, c])

    def bits(self, flags: Any) -> Any:
        """A vector of true and false as the bits of one whole number."""
        return self.builder.bitcast(flags, ir.IntType(self.width))


def element_bytes(element: ir.Type) -> int:
    if isinstance(element, ir.IntType):
        return element.width // 8
    return {ir.HalfType: 2, ir.FloatType: 4, ir.DoubleType: 8}[type(element)]


def index(value: int) -> ir.Constant:
    return ir.Constant(INDEX, value)


@intrinsic
def compiled_highest_bit(typing, word):
    signature = types.int64(types.int64)

    def generate(context, builder, signature, args):
        return builder.sub(index(63), builder.ctlz(args[0], ir.Constant(BIT, 1)))

    return signature, generate


def plain_highest_bit(word):
    return (int(word) & (2**64 - 1)).bit_length() - 1


@intrinsic
def compiled_prefetch(typing, table, row):
    """Ask for a row of a contiguous table of float32, so that it is there when it is read."""

    def generate(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        width = builder.extract_value(array.shape, 1)
        first = builder.gep(array.data, [builder.mul(args[1], width)])
        byte = ir.IntType(8).as_pointer()
        module, name = builder.module, "llvm.prefetch.p0"
        kind = ir.FunctionType(ir.VoidType(), [byte, SHORT, SHORT, SHORT])
        function = module.globals.get(name) or ir.Function(module, kind, name)
        lines = builder.udiv(builder.add(width, index(LINE - 1)), index(LINE))
        with for_range(builder, lines) as loop:
            line = builder.gep(first, [builder.mul(loop.index, index(LINE))])
            how = [ir.Constant(SHORT, number) for number in (0, 3, 1)]  # to read, to keep near, data
            builder.call(function, [builder.bitcast(line, byte), *how])
        return context.get_dummy_value()

    return types.void(table, types.int64), generate


def plain_prefetch(table, row):
    """Nothing to be asked for."""
