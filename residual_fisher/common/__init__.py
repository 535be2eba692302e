"""What both scripts need that is not about models: command lines, files, tables of data, drawing."""
