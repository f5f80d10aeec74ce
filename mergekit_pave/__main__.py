from mergekit_pave.cli import main

main(prog_name="mergekit-pave")
