"""Was an instruction followed? The catalogue of instructions, IFEval's checks offline, and checks of one's own."""
