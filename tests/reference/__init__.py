"""Slow, plain versions of what steerlens computes, written from the equations alone. They import nothing from steerlens."""
