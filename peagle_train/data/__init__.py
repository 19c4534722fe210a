"""From what users have to sequences: sources, chats and their masks, packing, preparation, vocabulary, order."""
